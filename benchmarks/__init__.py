"""The canonical workloads and the peers that metafast is measured against; installed as ``benchmarks``."""
