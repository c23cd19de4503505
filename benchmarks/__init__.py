"""Benchmarks of pkt_fast against its peers and against the limits of the machine."""
