"""The algorithm zoo: one folder per method family, installed as `decoupled.methods`."""
