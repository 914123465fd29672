"""Published specifications of GPUs, and the least time an operation can take on one (the roofline)."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Device:
    """Dense bfloat16 operations per second, bytes per second of its memory, to the next GPU and to host memory.

    host_link_share: part of the host link's rate that large copies from pinned memory reach.
    """

    name: str
    flops_per_s: float
    memory_bytes_per_s: float
    peer_bytes_per_s: float
    host_bytes_per_s: float
    host_link_share: float = 0.8

    def roofline_s(self, flops: float, num_bytes: float) -> float:
        """Seconds of so many operations on so many bytes of memory when nothing else holds them up."""
        return max(flops / self.flops_per_s, num_bytes / self.memory_bytes_per_s)

    @property
    def host_copy_bytes_per_s(self) -> float:
        """Bytes per second that copies to and from host memory reach."""
        return self.host_bytes_per_s * self.host_link_share


#: By the name that the command takes. NVIDIA's data sheets of A100 80GB SXM and H100 SXM: one direction of NVLink and
#: of PCIe 4.0 and 5.0 x16.
DEVICES = {
    "a100": Device("A100 80GB SXM", 312e12, 2.039e12, 300e9, 31.5e9),
    "h100": Device("H100 SXM", 989.4e12, 3.35e12, 450e9, 63e9),
}
