"""How much memory a piece of work took at its peak."""

import resource
from pathlib import Path

import torch


class PeakMemory:
    """Peak since `restart`, in MB: of the GPU's allocations on CUDA, of the process's resident memory on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.restart()

    def restart(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew
            except OSError:
                return

    def megabytes(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 1e6
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
            return float(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024 / 1e6
        except OSError:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
