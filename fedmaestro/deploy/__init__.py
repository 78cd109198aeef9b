"""From a trained model to one for a device: rank search, curves, extraction, latency."""
