"""The same federated job in this project and in others; each file runs in the environment of its own framework."""
