"""A port in miniature: RMSNorm and the gate in float32, from case folders alone, without the package.

    python sample_port.py CASE_DIR OUTPUT.safetensors [--broken]      one case; exit 77: not for this port
    python sample_port.py --demo --cases DIR                          several cases, right and broken, judged

The case folders have to be whole (`refimpl golden generate`): the committed ones leave out what is generated.
With --broken the port makes two mistakes that real ports made: RMSNorm subtracts the mean, and the gate takes
its routing weights from the biased scores.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

NOT_FOR_ME = 77
DEMO = ("norm/hidden", "norm/ranges", "gate/v3", "gate/bias-12", "gate/bias-negative")
TYPES = {"F64": "<f8", "F32": "<f4", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}


def read(path):
    """A safetensors file as a dict: 8 bytes of length, a JSON header, the bytes of the tensors."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            codes = np.frombuffer(data[begin:end], TYPES[entry["dtype"]]).reshape(entry["shape"])
            bf16 = entry["dtype"] == "BF16"
            tensors[name] = (codes.astype(np.uint32) << 16).view(np.float32) if bf16 else codes
    return tensors


def write(path, tensors):
    header, parts, end = {}, [], 0
    for name, array in tensors.items():
        kind, stored = ("I64", "<i8") if array.dtype.kind == "i" else ("F32", "<f4")
        parts.append(np.ascontiguousarray(array, stored).tobytes())
        begin, end = end, end + len(parts[-1])
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


def norm(case, tensors, broken):
    x, gain = tensors["x"], tensors[f"{case['path']}.weight"]
    if broken:
        x = x - x.mean(-1, keepdims=True)
    rms = np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(case["arguments"]["eps"]))
    return {case["path"]: x / rms * gain}


def gate(case, tensors, broken):
    config, path = case["config"], case["path"]
    logits = tensors["x"] @ tensors[f"{path}.weight"].T
    scores = 1 / (1 + np.exp(-logits))
    choice = scores + tensors[f"{path}.e_score_correction_bias"]
    groups = choice.reshape(len(choice), config["n_group"], -1)
    best = np.sort(groups, -1)[..., -2:].sum(-1)
    kept = np.argsort(-best, -1, kind="stable")[:, : config["topk_group"]]
    allowed = np.zeros(best.shape, bool)
    np.put_along_axis(allowed, kept, True, -1)
    masked = np.where(allowed[..., None], groups, -np.inf).reshape(choice.shape)
    idx = np.argsort(-masked, -1, kind="stable")[:, : config["num_experts_per_tok"]]
    weight = np.take_along_axis(choice if broken else scores, idx, -1)
    weight = weight / weight.sum(-1, keepdims=True) * np.float32(config["routed_scaling_factor"])
    parts = {"logits": logits, "scores": scores, "topk_idx": idx, "topk_weight": weight}
    return {f"{path}.{name}": value for name, value in parts.items()}


def port(folder, output, broken):
    case = json.loads((folder / "case.json").read_text())
    known = {"norm": norm, "gate": gate}
    v3 = case["config"].get("topk_method") == "noaux_tc" and case["config"]["norm_topk_prob"]
    if case["kind"] != "forward" or case["component"] not in known or not v3:
        return NOT_FOR_ME
    write(output, known[case["component"]](case, read(folder / "inputs.safetensors"), broken))
    return 0


def demo(root):
    """Every demonstrated case has to hold for the right port, and none for the broken one."""
    wrong = 0
    print(f"{'case':22}{'port':8}{'verdict':16}first tensor that is off")
    with tempfile.TemporaryDirectory() as folder:
        output, verdict = Path(folder) / "output.safetensors", Path(folder) / "verdict.json"
        for broken in (False, True):
            for name in DEMO:
                if port(root / name, output, broken) != 0:
                    raise SystemExit(f"{name} is not for this port")
                command = [sys.executable, "-m", "refimpl", "check", root / name, output, "--json", verdict]
                shown = subprocess.run(command, capture_output=True, text=True)
                if shown.returncode not in (0, 1):
                    raise SystemExit(shown.stderr)
                found = json.loads(verdict.read_text())
                wrong += found["holds"] is broken
                port_name = "broken" if broken else "right"
                held = "holds" if found["holds"] else "does not hold"
                print(f"{name:22}{port_name:8}{held:16}{found['first_off'] or ''}")
    print(f"\nThe last verdict in full:\n\n{shown.stdout}")
    return 1 if wrong else 0


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", nargs="?", type=Path)
    parser.add_argument("output", nargs="?", type=Path)
    parser.add_argument("--broken", action="store_true")
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--cases", type=Path, default=Path("build/golden"))
    given = parser.parse_args()
    if given.demo:
        return demo(given.cases)
    if given.case is None or given.output is None:
        parser.error("a case folder and an output file are required")
    return port(given.case, given.output, given.broken)


if __name__ == "__main__":
    sys.exit(main())
