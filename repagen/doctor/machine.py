"""Software, devices, disks, and what really runs on them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.models.attention_dispatch import AttentionBackendName

from repagen.doctor.report import Finding, Level, Section, readable_size
from repagen.errors import one_line
from repagen.layers.attention_trial import AttentionTrial, try_attention

_REQUIRED = ("repagen", "torch", "torchvision", "diffusers", "transformers", "accelerate", "peft", "huggingface_hub")
_OPTIONAL = ("xformers", "flash-attn", "bitsandbytes", "torchao", "torchmetrics", "lpips", "timm")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_COMPILE_TIMEOUT_S = 300
_COMPILED = """
import sys, torch
x = torch.arange(8.0, device=sys.argv[1])
found = torch.compile(lambda x: torch.sin(x) * 2 + 1)(x)
torch.testing.assert_close(found, torch.sin(x) * 2 + 1)
"""


def software() -> Section:
    """Versions of what the library stands on."""
    findings = [Finding("python", platform.python_version(), facts={"version": platform.python_version()})]
    for package in (*_REQUIRED, *_OPTIONAL):
        try:
            version: str | None = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = None
        missing: Level = "problem" if package in _REQUIRED else "ok"
        text = version or ("not installed" if package in _REQUIRED else "not installed (optional)")
        findings.append(Finding(package, text, "ok" if version else missing, facts={"version": version}))
    cuda = torch.version.cuda or "none, this torch is built for the CPU"
    findings.insert(3, Finding("CUDA of torch", cuda, facts={"version": torch.version.cuda}))
    return Section("Software", findings)


def devices_here() -> list[torch.device]:
    """The CPU, and every GPU that torch can use."""
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def hardware(places: Sequence[tuple[str, Path]]) -> Section:
    """Devices with their memory, and the free space where something will be written.

    Args:
        places: (what it is, folder) each; the folder may not be there yet.
    """
    threads, cores = torch.get_num_threads(), os.cpu_count()
    text = f"{cores} cores, {threads} threads in use by torch"
    findings = [Finding("CPU", text, facts={"cores": cores, "threads": threads})]
    for device in devices_here()[1:]:
        free, total = torch.cuda.mem_get_info(device)
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        text = (
            f"{name}, compute capability {capability[0]}.{capability[1]}, {readable_size(free)} of "
            f"{readable_size(total)} free"
        )
        findings.append(Finding(str(device), text, facts={"name": name, "free": free, "total": total}))
    if len(findings) == 1:
        findings.append(Finding("GPU", "none that torch can use; everything runs on the CPU", "note"))
    for name, folder in places:
        existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        usage = shutil.disk_usage(existing)
        findings.append(
            Finding(f"disk of {name}", f"{readable_size(usage.free)} free ({folder})", facts={"free": usage.free})
        )
    return Section("Hardware", findings)


def computations(*, compiler: bool) -> Section:
    """bfloat16, and torch.compile where `compiler` says so (a minute on a slow CPU), by running them."""
    findings = [_bfloat16(device) for device in devices_here()]
    if compiler:
        findings += [_compile(device) for device in devices_here()]
    else:
        findings.append(Finding("torch.compile", "not tried, which takes up to a minute; --compile tries it"))
    return Section("Computations, tried", findings)


def _bfloat16(device: torch.device) -> Finding:
    name = f"bfloat16 matmul on {device}"
    drawn = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = drawn[0].double() @ drawn[1].double()
    try:
        found = (drawn[0].to(device) @ drawn[1].to(device)).double().cpu()
    except RuntimeError as error:
        return Finding(name, f"refused: {one_line(error)}", "note")
    error_of_it = ((found - expected).abs().max() / expected.abs().max()).item()
    is_right = error_of_it <= 2**-7
    return Finding(name, "works" if is_right else f"wrong by {error_of_it:.2g}", "ok" if is_right else "problem")


def _compile(device: torch.device) -> Finding:
    """Compile a tiny function in a process of its own, so that nothing is left of a compiler that hangs or dies."""
    name = f"torch.compile on {device}"
    with tempfile.TemporaryDirectory() as cache:
        try:
            ran = subprocess.run(
                [sys.executable, "-c", _COMPILED, str(device)],
                env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
                capture_output=True,
                text=True,
                timeout=_COMPILE_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            return Finding(name, f"did not end in {_COMPILE_TIMEOUT_S} s; leave it off", "note")
    if ran.returncode == 0:
        return Finding(name, "works")
    lines = [line.strip() for line in ran.stderr.splitlines() if "Error" in line] or [f"exit code {ran.returncode}"]
    return Finding(name, f"refused: {one_line(RuntimeError(lines[-1]))}; leave it off", "note")


def attention() -> Section:
    """Every attention backend of diffusers on every device and in every dtype, forward and backward."""
    findings: list[Finding] = []
    for device in devices_here():
        refused: dict[str, list[str]] = {}
        for backend in AttentionBackendName:
            if backend.value.endswith("_hub") and importlib.util.find_spec("kernels") is not None:
                reason = "a kernel from the Hub, which is code of others: not tried; set_attention_backend fetches it"
                refused.setdefault(reason, []).append(backend.value)
                continue
            trials = {dtype: try_attention(backend.value, device, dtype) for dtype in _DTYPES}
            if any(trial.error is not None for trial in trials.values()):
                findings.append(_backend(backend.value, device, trials))
            else:
                reason = str(next(iter(trials.values())).reason).removeprefix(f"attention backend {backend.value!r} ")
                refused.setdefault(reason.partition("; ")[0], []).append(backend.value)
        findings += [
            Finding(f"not on {device}", f"{', '.join(names)}: {reason}", facts={"backends": names})
            for reason, names in refused.items()
        ]
    return Section("Attention backends, tried", findings)


def _backend(name: str, device: torch.device, trials: dict[torch.dtype, AttentionTrial]) -> Finding:
    """One line: in which dtypes a backend trains, only samples, or is wrong, and why."""
    groups: dict[str, list[str]] = {}
    for dtype, trial in trials.items():
        groups.setdefault(_outcome(trial), []).append(str(dtype).removeprefix("torch."))
    text = "; ".join(f"{outcome} in {', '.join(dtypes)}" for outcome, dtypes in groups.items())
    reasons = dict.fromkeys(trial.reason for trial in trials.values() if trial.reason)
    wrong = any(trial.is_wrong for trial in trials.values())
    broken = wrong or (name == "native" and not all(trial.trains for trial in trials.values()))
    return Finding(
        f"{name} on {device}",
        text,
        "problem" if broken else "ok",
        details=[str(reason) for reason in reasons],
        facts={**groups},
    )


def _outcome(trial: AttentionTrial) -> str:
    if trial.is_wrong:
        return "gives wrong values"
    if trial.trains:
        return "samples and trains"
    return "only samples" if trial.runs else "does not run"
