"""The Flower shell and the composition root: messages, server and client apps, the simulation on Ray."""
