"""Devices: tiers and budgets, costs, the virtual clock, and the ranks of every tier."""
