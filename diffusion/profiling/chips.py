"""Specifications of accelerators, as published by their manufacturers."""

import dataclasses

GB, TFLOPS = 1e9, 1e12


@dataclasses.dataclass(frozen=True)
class Chip:
    """An accelerator.

    Attributes:
      memory: HBM capacity in bytes.
      flops: Peak throughput of dense bfloat16 matrix products, FLOP/s.
      bandwidth: HBM bandwidth, bytes/s.
      interconnect: Bytes/s sent to other chips over all links, which is half of a bidirectional figure.
      source: Source of the figures.
      kind: JAX's `device_kind`, or a prefix of it.
    """

    memory: int
    flops: float
    bandwidth: float
    interconnect: float
    source: str
    kind: str


CLOUD, DATASHEET = "https://cloud.google.com/tpu/docs", "NVIDIA data sheet"
# The documents give the HBM of v5e and v6e in GB, but the compiler counts GiB, as the documents do for v4 and v5p.
CHIPS = {
    # The document does not state the interconnect: 6 links of 50 GB/s, Jouppi et al. 2023 (arXiv 2304.01433).
    "v4": Chip(32 * 2**30, 275 * TFLOPS, 1200 * GB, 300 * GB, f"{CLOUD}/v4, arXiv 2304.01433", "TPU v4"),
    "v5e": Chip(16 * 2**30, 197 * TFLOPS, 819 * GB, 200 * GB, f"{CLOUD}/v5e", "TPU v5 lite"),
    "v5p": Chip(95 * 2**30, 459 * TFLOPS, 2765 * GB, 600 * GB, f"{CLOUD}/v5p", "TPU v5"),
    "v6e": Chip(32 * 2**30, 918 * TFLOPS, 1638 * GB, 400 * GB, f"{CLOUD}/v6e", "TPU v6 lite"),
    # FLOP/s without sparsity, NVLink within a machine. A100 and H100 are the 80 GB SXM versions.
    "A100": Chip(80 * 10**9, 312 * TFLOPS, 2039 * GB, 300 * GB, f"{DATASHEET} A100 80GB SXM", "NVIDIA A100"),
    "H100": Chip(80 * 10**9, 989 * TFLOPS, 3350 * GB, 450 * GB, f"{DATASHEET} H100 SXM", "NVIDIA H100"),
    "H200": Chip(141 * 10**9, 989 * TFLOPS, 4800 * GB, 450 * GB, f"{DATASHEET} H200 SXM", "NVIDIA H200"),
}
