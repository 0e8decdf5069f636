"""What a tool in the container made, given back to the project."""
