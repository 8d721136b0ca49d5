"""What comes from outside: JSON that is bounded before it is built, and messages of bounded length about it."""
