"""ServerApp: handshake, round loop, checkpoints, run folder."""
