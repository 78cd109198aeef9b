"""The validation split: training examples that nobody trains on, drawn by the seed alone (``data.validation``)."""

import numpy as np

from fedmaestro import rng
from fedmaestro.data.parts import Indices
from fedmaestro.errors import UserError


def hold_out(count: int, amount: float, seed: int, users: Indices | None = None) -> tuple[Indices, Indices]:
    """Return the examples that are left, in a random order, and those that are held out, sorted.

    Args:
        count: ``N`` training examples.
        amount: how many are held out: a number, or below 1 a share of all.
        seed: the experiment's.
        users: ``(N,)``, whose each example is, where every user must keep one; None: nobody must.

    Raises:
        UserError: nothing is left, of all or of a user, or a share is less than one example.
    """
    held = round(amount * count) if amount < 1 else int(amount)
    if held >= count:
        raise UserError(f"data.validation={amount} leaves nothing of {count} training examples: lower it")
    if amount and not held:
        raise UserError(f"data.validation={amount} of {count} training examples is none: raise it")
    order = rng.generator(seed, "split").permutation(count)
    if held and users is not None:
        order = _one_kept(order, users, held, amount)
    return order[held:], np.sort(order[:held])


def _one_kept(order: Indices, users: Indices, held: int, amount: float) -> Indices:
    """Return the order with the last example of every user behind all others."""
    ids, from_end = np.unique(users[order[::-1]], return_index=True)
    if held > len(order) - len(ids):
        raise UserError(
            f"data.validation={amount} leaves a user nothing: each of {len(ids)} keeps an example (data.partition = "
            f"'natural'), so at most {len(order) - len(ids)} of {len(order)} can be held out: lower it"
        )
    last = np.zeros(len(order), bool)
    last[len(order) - 1 - from_end] = True
    return np.concatenate([order[~last], order[last]])
