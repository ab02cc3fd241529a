"""What is printed and drawn for people."""
