"""Federations on one machine: engines, studies of claims, benches of speed."""
