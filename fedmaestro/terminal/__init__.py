"""What the user sees in the terminal."""
