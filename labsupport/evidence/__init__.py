"""What is measured and computed to support a statement: the machine, rooflines, benchmarks, sweeps, planning, claims."""
