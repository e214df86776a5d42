"""`ingot generate artifact=ID "prompt" [--chat] [--max-new-tokens N]`: one answer, from an engine in this process."""

from __future__ import annotations

from cli.arguments import Parser
from cli.target import find_target, open_tokenizer

SHORT_BATCH = 1


def main(argv: list[str]) -> int:
    parser = Parser(prog="ingot generate", description=__doc__, allow_abbrev=False)
    parser.add_argument("target", help="artifact=ID (id, unique prefix or name) or folder=WORKSPACE")
    parser.add_argument("prompt")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="GPUs, or processes on the CPU, together (1)")
    parser.add_argument("--waiver", metavar="REASON", help="run an artifact that has not passed its evaluation")
    parser.add_argument("--store", metavar="PATH", help="another store than this checkout's")
    options = parser.parse_args(argv)
    key, _, value = options.target.partition("=")
    if key not in ("artifact", "folder") or not value:
        raise ValueError(f"{options.target!r} names nothing to run: write artifact=ID or folder=WORKSPACE.")
    target = find_target(
        artifact=value if key == "artifact" else None,
        folder=value if key == "folder" else None,
        waiver=options.waiver,
        store=options.store,
    )
    # Torch takes seconds to import; what is wrong with the arguments is said before.
    from engine.config import EngineConfig, Sampling
    from engine.runtime.engine import Engine
    from engine.storage.artifacts import verify

    if target.model.artifact_id:
        verify(target.folder, target.model.artifact_id)
    tokenizer = open_tokenizer(target)
    if options.chat:
        prompt_ids = tokenizer.encode_chat([{"role": "user", "content": options.prompt}])
    else:
        prompt_ids = tokenizer.encode(options.prompt)
    engine = Engine.from_workspace(
        target.folder,
        EngineConfig(max_batch_size=SHORT_BATCH, tp=options.tp, end_ids=tokenizer.eos_token_ids),
    )
    sampling = Sampling(max_new_tokens=options.max_new_tokens, temperature=options.temperature)
    [answer] = engine.generate([prompt_ids], sampling)
    print(answer.text)
    return 0
