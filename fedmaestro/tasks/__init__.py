"""What is learnt: inputs, loss, evaluation."""
