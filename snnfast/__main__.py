"""``python -m snnfast``: versions, devices, and what each backend serves or why not. ``--json`` for machines."""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

import torch

from . import __version__, backends
from .backends import native, triton


def _devices() -> list[dict[str, str]]:
    found = [{"device": "cpu", "name": platform.processor() or platform.machine()}]
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind, None)
        if module is not None and module.is_available():
            found += [
                {"device": f"{kind}:{i}", "name": module.get_device_name(i)} for i in range(module.device_count())
            ]
    return found


def report() -> dict[str, Any]:
    """Everything that this module prints."""
    devices = _devices()
    chosen, problems = {}, {}
    for entry in devices:
        device = torch.device(entry["device"])
        try:
            chosen[entry["device"]] = backends.NAMES[1:][backends.choose("auto", device)]
        except (ValueError, RuntimeError) as error:  # SNNFAST_BACKEND; what it says sends people here
            chosen[entry["device"]] = f"nothing: {error}"
        problems[entry["device"]] = {
            name: kernels.missing(device) for name, kernels in zip(backends.NAMES[1:], backends.KERNELS, strict=False)
        }
    if "cuda:0" not in chosen and native.missing(torch.device("cpu")) is None and not native.has_cuda_kernels():
        problems["cuda"] = {"native": native.missing(torch.device("cuda", 0))}
    try:
        import triton as triton_package

        triton_version = triton_package.__version__
    except ImportError:
        triton_version = None
    return {
        "versions": {
            "snnfast": __version__,
            "torch": torch.__version__,
            "triton": triton_version,
            "python": platform.python_version(),
            "cuda of torch": torch.version.cuda,
        },
        "devices": devices,
        "threads": torch.get_num_threads(),
        "backends": {
            "native": native.served(),
            "triton": triton.served(),
            "reference": "every device, as a plain loop",
        },
        "auto": chosen,
        "missing": problems,
        "openmp runtimes": native.openmp_runtimes(),
    }


def _print(r: dict[str, Any]) -> None:
    print("snnfast " + ", ".join(f"{k} {v}" for k, v in r["versions"].items() if v).removeprefix("snnfast "))
    print("\ndevices")
    for entry in r["devices"]:
        print(f"  {entry['device']:8} {entry['name']}; backend='auto' takes {r['auto'][entry['device']]}")
    print("\nbackends")
    for name, serves in r["backends"].items():
        print(f"  {name:10} serves {serves}")
        for device, reasons in r["missing"].items():
            if reasons.get(name):
                print(f"  {'':10} not {device}: {reasons[name]}")
    runtimes = r["openmp runtimes"]
    print(f"\n{r['threads']} thread(s), OpenMP runtime: {', '.join(runtimes) or 'none found'}")
    if len(runtimes) > 1:
        print("  warning: two OpenMP runtimes in one process keep two thread pools, which take each other's cores")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m snnfast", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    found = report()
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)


if __name__ == "__main__":
    main()
