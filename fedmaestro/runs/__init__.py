"""Run folders: layout, checkpoints, models, records, and the one reader of all of them."""
