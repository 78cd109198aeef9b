"""One round without Flower: environment, schedule, device work, the server's side."""
