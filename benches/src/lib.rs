//! Benchmarks of culvert: `benches/` times single steps, the program `culvert-bench` loads the real proxy.
