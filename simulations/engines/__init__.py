"""Four ways to run the same ServerApp, ClientApp and strategy on one machine, bit for bit the same."""
