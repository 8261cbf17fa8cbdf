"""Devices and links by name: what they compute, move and hold, each with its source. No torch.

Rates are peaks that vendors print (dense, without sparsity); what a program reaches is measured by `ceilings.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

GB, TB, TFLOPS = 1e9, 1e12, 1e12


@dataclass(frozen=True)
class Device:
    """One device. Rates are per second; `memory_bytes` is what it holds.

    `flops` maps a dtype's name to the peak rate of matrix products in it.
    """

    name: str
    flops: dict[str, float]
    bytes_per_s: float
    memory_bytes: float
    source: str

    def flops_per_s(self, dtype: str) -> float:
        """The peak for a dtype. Raises `ValueError` when the table has none, naming those it has."""
        if dtype not in self.flops:
            raise ValueError(f"{self.name} has no rate for {dtype}; it has {', '.join(self.flops)}")
        return self.flops[dtype]

    def ridge(self, dtype: str) -> float:
        """The intensity (operations per byte) from which on products are bound by computing."""
        return self.flops_per_s(dtype) / self.bytes_per_s


@dataclass(frozen=True)
class Link:
    """What carries messages: `bytes_per_s` in one direction, and the delay of an empty message."""

    name: str
    bytes_per_s: float
    latency_s: float
    source: str

    def time_s(self, message_bytes: float) -> float:
        """Seconds for one message: latency + bytes / bandwidth."""
        return self.latency_s + message_bytes / self.bytes_per_s


def _half(rate: float) -> dict[str, float]:
    return {"bfloat16": rate * TFLOPS, "float16": rate * TFLOPS}


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("T4", {"float16": 65 * TFLOPS, "float32": 8.1 * TFLOPS}, 320 * GB, 16 * GB, "NVIDIA T4 datasheet, 2019"),
        Device(
            "V100 32GB", {"float16": 125 * TFLOPS, "float32": 15.7 * TFLOPS}, 900 * GB, 32 * GB, "NVIDIA V100 SXM2 datasheet, 2018"
        ),
        Device(
            "RTX 4090", {**_half(165.2), "float32": 82.6 * TFLOPS}, 1008 * GB, 24 * GB, "NVIDIA Ada GPU architecture whitepaper, 2022: FP16 with FP32 sums"
        ),
        Device(
            "L40S", {**_half(362), "float32": 91.6 * TFLOPS}, 864 * GB, 48 * GB, "NVIDIA L40S datasheet, 2023: half of what it prints with sparsity"
        ),
        Device("L4", {**_half(121), "float32": 30.3 * TFLOPS}, 300 * GB, 24 * GB, "NVIDIA L4 datasheet, 2023"),
        Device(
            "A100 80GB", {**_half(312), "float32": 19.5 * TFLOPS}, 2039 * GB, 80 * GB, "NVIDIA A100 SXM datasheet, 2021"
        ),
        Device(
            "H100", {**_half(989), "float8": 1979 * TFLOPS, "float32": 67 * TFLOPS}, 3.35 * TB, 80 * GB, "NVIDIA H100 SXM datasheet, 2023"
        ),
        Device(
            "H200", {**_half(989), "float8": 1979 * TFLOPS, "float32": 67 * TFLOPS}, 4.8 * TB, 141 * GB, "NVIDIA H200 SXM datasheet, 2024"
        ),
        Device(
            "B200", {**_half(2250), "float8": 4500 * TFLOPS, "float32": 75 * TFLOPS}, 8 * TB, 180 * GB, "NVIDIA HGX B200 datasheet, 2025: an eighth of the board"
        ),
    )
}  # fmt: skip

LINKS: dict[str, Link] = {
    link.name: link
    for link in (
        Link("NVLink 4", 450 * GB, 2e-6, "NVIDIA H100 SXM datasheet: 900 GB/s both ways; latency a round figure"),
        Link("NVLink 3", 300 * GB, 2e-6, "NVIDIA A100 SXM datasheet: 600 GB/s both ways; latency a round figure"),
        Link("PCIe 5 x16", 63 * GB, 5e-6, "PCI-SIG: 32 GT/s on 16 lanes, 128b/130b; latency a round figure"),
        Link("PCIe 3 x16", 15.75 * GB, 5e-6, "PCI-SIG: 8 GT/s on 16 lanes, 128b/130b; latency a round figure"),
        Link("PCIe 4 x16", 31.5 * GB, 5e-6, "PCI-SIG: 16 GT/s on 16 lanes, 128b/130b; latency a round figure"),
        Link("400 Gbit/s", 50 * GB, 5e-6, "line rate; latency a round figure for InfiniBand"),
        Link("100 Gbit/s", 12.5 * GB, 10e-6, "line rate; latency a round figure for Ethernet with RDMA"),
        Link("25 Gbit/s", 3.125 * GB, 30e-6, "line rate; latency a round figure for Ethernet with TCP"),
        Link("10 Gbit/s", 1.25 * GB, 30e-6, "line rate; latency a round figure for Ethernet with TCP"),
        Link("1 Gbit/s", 0.125 * GB, 50e-6, "line rate; latency a round figure for Ethernet with TCP"),
    )
}


def find_device(name: str) -> Device:
    """A device by its name. Raises `ValueError` that lists the names."""
    if name not in DEVICES:
        raise ValueError(f"device {name!r} is not in the table; it has {', '.join(DEVICES)}")
    return DEVICES[name]


def find_link(name: str) -> Link:
    """A link by its name. Raises `ValueError` that lists the names."""
    if name not in LINKS:
        raise ValueError(f"link {name!r} is not in the table; it has {', '.join(LINKS)}")
    return LINKS[name]
