"""The commands of LMDeploy v0.1.0 on plain folders, without a build, a store or an evaluation.

    ingot convert NAME PATH [--model-format awq --group-size 128 --tp 2 --dst-path ./workspace]
    ingot lite calibrate MODEL [--calib-dataset ptb --calib-samples 128 --calib-seqlen 2048 --work-dir DIR]
    ingot lite auto_awq MODEL [--w-bits 4 --w-group-size 128 --work-dir DIR]
    ingot lite smooth_quant MODEL [--work-dir DIR]
    ingot lite kv_qparams WORK_DIR TURBOMIND_DIR [--kv-sym] [--num-tp 1]

Flags are written with hyphens or underscores; one that is not known is an error.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path
from typing import Any

from cli.arguments import Parser

TRUTHS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def convert(argv: list[str]) -> int:
    parser = Parser(prog="ingot convert", description="a checkpoint as a plain TurboMind workspace", allow_abbrev=False)
    parser.add_argument("model_name", metavar="NAME", help="the chat template's name, written into config.ini")
    parser.add_argument("model_path", metavar="PATH", type=Path, help="the folder of the checkpoint")
    parser.add_argument("--model-format", metavar="hf|awq|llama", help="hf; awq: 4-bit AWQ weights; llama: Meta's .pth")
    parser.add_argument("--group-size", type=int, metavar="N", help="of AWQ weights; without it, what they have")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel ranks (1)")
    parser.add_argument("--dst-path", type=Path, default=Path("workspace"), metavar="DIR", help="(./workspace)")
    parser.add_argument("--tokenizer-path", type=Path, metavar="P", help="another tokenizer: its file or its folder")
    parser.add_argument("--quant-path", type=Path, metavar="DIR", help="where the AWQ weights are, if not in PATH")
    switch(parser, "--overwrite", "replace a workspace that is there")
    switch(parser, "--allow-bin", "read pickled weights (.bin, .pth), as weights alone")
    options = parse_flags(parser, argv)
    # Torch takes seconds to import; what is wrong with the arguments is said before.
    from pipelines.convert import Conversion, convert
    from pipelines.seed_names import SEED_NAMES

    converted = convert(
        Conversion(
            name=options.model_name,
            source=options.model_path,
            target=options.dst_path,
            model_format=options.model_format or "hf",
            group_size=options.group_size or None,
            tp=options.tp,
            tokenizer=options.tokenizer_path,
            weights_folder=options.quant_path,
            overwrite=options.overwrite,
            allow_bin=options.allow_bin,
        )
    )
    if options.model_name not in SEED_NAMES:
        own = "session_len and chat template are the model's own"
        print(f"{options.model_name} is no name of LMDeploy's: {own}", file=sys.stderr)
    if converted.warning:
        print(f"ingot: {converted.warning}", file=sys.stderr)
    ini, template = converted.ini, converted.template
    said = "no chat template" if template is None else f"chat template {template}"
    print(f"{options.dst_path}: {ini.weight_type}, tp={ini.tensor_para_size}, session_len {ini.session_len}, {said}")
    print("A plain folder: nobody has measured it. `ingot build` makes artifacts that are.", file=sys.stderr)
    return 0


def lite(argv: list[str]) -> int:
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    verb = argv[0].replace("-", "_") if argv else ""
    verbs = {"calibrate": calibrate, "auto_awq": auto_awq, "smooth_quant": smooth_quant, "kv_qparams": kv_qparams}
    if verb not in verbs:
        raise ValueError(
            f"`ingot lite {argv[0] if argv else ''}` is not there: `ingot lite` has {', '.join(verbs)}. Artifacts, and "
            "every other recipe, are made by `ingot build`."
        )
    return verbs[verb](argv[1:])


def calibrate(argv: list[str]) -> int:
    parser = Parser(prog="ingot lite calibrate", description="what flows through a model", allow_abbrev=False)
    _calibration_flags(parser)
    options = parse_flags(parser, argv)
    model, data = _model(options), _data(options)
    from pipelines.lite import Data, calibrate_folder

    about = calibrate_folder(model, options.work_dir, Data(**data), allow_bin=options.allow_bin, device=options.device)
    [part] = about["sources"].values()
    print(f"{options.work_dir}: calibrated on {part['blocks']} blocks of {about['asked']['sequence_length']} tokens")
    return 0


def auto_awq(argv: list[str]) -> int:
    parser = Parser(prog="ingot lite auto_awq", description="4-bit weights, as HF-AWQ", allow_abbrev=False)
    _calibration_flags(parser)
    parser.add_argument("--w-bits", type=int, default=4, metavar="4")
    parser.add_argument("--w-group-size", type=int, default=128, metavar="N", help="inputs in a group (128)")
    switch(parser, "--w-sym", "zero points in the middle")
    methods = "awq+gptq (default), awq, gptq, rtn; reference: LMDeploy's own formula"
    parser.add_argument("--method", default="awq+gptq", metavar="M", help=methods)
    options = parse_flags(parser, argv)
    model, data = _model(options), _data(options)
    if options.w_bits != 4:
        raise ValueError(f"--w-bits {options.w_bits} is not supported: AWQ weights have 4 bits")
    from pipelines.lite import Data
    from pipelines.lite import auto_awq as quantize

    fresh = quantize(
        model,
        options.work_dir,
        Data(**data) if data else None,
        group_size=options.w_group_size,
        method=options.method,
        symmetric=options.w_sym,
        allow_bin=options.allow_bin,
        device=options.device,
    )
    calibrated = "calibrated and quantized" if fresh else "quantized on the calibration that was there"
    if options.method == "rtn":
        calibrated = "quantized"
    print(f"{options.work_dir}: {calibrated}, 4 bits in groups of {options.w_group_size}")
    print(f"`ingot convert NAME {options.work_dir} --model-format awq` makes a workspace of it.", file=sys.stderr)
    return 0


def smooth_quant(argv: list[str]) -> int:
    parser = Parser(prog="ingot lite smooth_quant", description="8-bit weights and activations", allow_abbrev=False)
    _calibration_flags(parser, dataset="ptb")
    methods = "searched (default): an alpha for each pair of modules; reference: LMDeploy's own formula"
    parser.add_argument("--method", default="searched", metavar="M", help=methods)
    options = parse_flags(parser, argv)
    model, data = _model(options), _data(options)
    from pipelines.lite import Data
    from pipelines.lite import smooth_quant as quantize

    fresh = quantize(
        model,
        options.work_dir,
        Data(**({"dataset": "ptb"} | data)) if data else None,
        method=options.method,
        allow_bin=options.allow_bin,
        device=options.device,
    )
    calibrated = "calibrated and quantized" if fresh else "quantized on the calibration that was there"
    print(f"{options.work_dir}: {calibrated}, 8-bit weights and activations")
    print(f"`ingot convert NAME {options.work_dir}` makes a workspace of it.", file=sys.stderr)
    return 0


def kv_qparams(argv: list[str]) -> int:
    parser = Parser(prog="ingot lite kv_qparams", description="scales of an int8 KV cache", allow_abbrev=False)
    parser.add_argument("work_dir", metavar="WORK_DIR", type=Path, help="what calibration wrote: stats.safetensors")
    parser.add_argument("turbomind_dir", metavar="TURBOMIND_DIR", type=Path, help="WORKSPACE/triton_models/weights")
    parser.add_argument("--kv-bits", type=int, default=8, metavar="8")
    switch(parser, "--kv-sym", "zero points 0, scales from the largest magnitude")
    parser.add_argument("--num-tp", type=int, default=1, metavar="N", help="ranks of the workspace (1)")
    options = parse_flags(parser, argv)
    from pipelines.kv_qparams import write_kv_qparams

    written = write_kv_qparams(
        options.work_dir, options.turbomind_dir, bits=options.kv_bits, symmetric=options.kv_sym, tp=options.num_tp
    )
    for layer, rank, k_scale, k_zero, v_scale, v_zero in written.rows:
        print(f"layer {layer} rank {rank}: k {k_scale:.6g} zero {k_zero:.6g}, v {v_scale:.6g} zero {v_zero:.6g}")
    if written.config_ini is not None:
        print(f"{written.config_ini}: quant_policy is 4 now, there is nothing left to edit by hand")
    else:
        print(f"{options.turbomind_dir} has no config.ini: set quant_policy = 4 in the one that goes with these files")
    if written.warning:
        print(f"ingot: {written.warning}", file=sys.stderr)
    return 0


def _calibration_flags(parser: argparse.ArgumentParser, *, dataset: str = "c4") -> None:
    parser.add_argument("given", nargs="?", type=Path, metavar="MODEL", help="the folder of the checkpoint")
    parser.add_argument("--model", type=Path, metavar="MODEL", help="the same, as a flag")
    kinds = f"c4, ptb, wikitext2, pileval ({dataset} if none is given); text or chat: your own, with --calib-path"
    parser.add_argument("--calib-dataset", metavar="SET", help=kinds)
    parser.add_argument("--calib-path", type=Path, metavar="PATH", help="a local copy of the set: its file or folder")
    parser.add_argument("--calib-samples", type=int, metavar="N", help="blocks to calibrate on (128)")
    parser.add_argument("--calib-seqlen", type=int, metavar="N", help="tokens of a block (2048)")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dir"), metavar="DIR", help="(./work_dir)")
    parser.add_argument("--device", default="cpu", metavar="D", help="cpu (default) or cuda")
    switch(parser, "--allow-bin", "read pickled weights (.bin, .pth), as weights alone")


def _model(options: argparse.Namespace) -> Path:
    if (options.given is None) == (options.model is None):
        raise ValueError("give the folder of the checkpoint once: as the first argument, or with --model")
    return Path(options.given or options.model)


def _data(options: argparse.Namespace) -> dict[str, Any]:
    """What was said of the calibration data, by the names that it has in pipelines.lite."""
    said = {
        "dataset": options.calib_dataset,
        "path": options.calib_path,
        "samples": options.calib_samples,
        "sequence_length": options.calib_seqlen,
    }
    if options.calib_path is not None and options.calib_dataset is None:
        raise ValueError(
            f"--calib-path {options.calib_path} goes with --calib-dataset: say which set it is a copy of, or "
            "that it is text or chat"
        )
    return {name: value for name, value in said.items() if value is not None}


def switch(parser: argparse.ArgumentParser, flag: str, text: str, *, default: bool = False) -> None:
    """A flag that is given alone or, as LMDeploy took it, with True or False."""
    parser.add_argument(flag, nargs="?", const=True, default=default, type=_truth, metavar="True", help=text)


def _truth(text: str) -> bool:
    if text.lower() not in TRUTHS:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return TRUTHS[text.lower()]


def parse_flags(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """`parser.parse_args` with underscores in flags as hyphens; ValueError with the nearest flag for an unknown one."""
    known = parser._option_string_actions
    arguments: list[str] = []
    for at, text in enumerate(argv):
        flag, equals, value = text.partition("=")
        if not text.startswith("--") or text == "--":
            arguments.append(text)
            continue
        flag = flag.replace("_", "-")
        if flag not in known:
            near = difflib.get_close_matches(flag, [name for name in known if name.startswith("--")], n=1)
            meant = f"Did you mean {near[0]}? " if near else ""
            raise ValueError(f"there is no flag {text}. {meant}`{parser.prog} --help` lists the flags.")
        # A switch takes no word after it that is neither True nor False: that is the next argument.
        if known[flag].nargs == "?" and not equals and (argv[at + 1 : at + 2] or [""])[0].lower() not in TRUTHS:
            equals, value = "=", "True"
        arguments.append(f"{flag}{equals}{value}")
    return parser.parse_args(arguments)
