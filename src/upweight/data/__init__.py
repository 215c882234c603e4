"""Rows to forests: read -> formats -> trees -> pack, and stream for what crosses them."""
