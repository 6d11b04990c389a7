"""What a person reads about a simulation."""
