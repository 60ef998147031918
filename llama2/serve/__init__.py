"""What a person talks to: the terminal chat."""
