"""The apps of `bench deployment-overhead`: one server, and the two clients that the real one is compared to."""
