"""What is typed, and what is said of it: commands, their options, and what is wrong with them."""
