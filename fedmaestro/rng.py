"""One random generator per (run seed, purpose, round, device, …); nothing in FedMaestro draws from a global one."""

import zlib

import numpy as np


def generator(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """Return the generator of ``purpose`` at ``indices`` (round, device, …), independent of every other one.

    The same arguments give the same stream on every host, in every process and after a resume.
    """
    # The count keeps (1,) and (1, 0) apart: SeedSequence pads its entropy with zeros.
    entropy = [seed, zlib.crc32(purpose.encode()), len(indices), *indices]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


def derived_seed(seed: int, purpose: str, *indices: int) -> int:
    """Return a 32-bit seed for libraries that want a number (PyTorch's initialisation)."""
    return int(generator(seed, purpose, *indices).integers(2**32))
