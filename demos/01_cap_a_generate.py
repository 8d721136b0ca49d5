"""Cap an unmodified ``generate``: the same call, one more argument, a hard limit in bytes.

    python demos/01_cap_a_generate.py [--model NAME_OR_PATH] [--cap 20MiB] [--tokens 500]

Look at the last lines: tokens went on after the cap was reached, and the peak stayed below it.
"""

from __future__ import annotations

import argparse

import agentmem
from agentmem import models
from agentmem.settings import format_bytes
from support.refusals import positive, run


def main() -> None:
    """Generate more tokens than the cap can hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a Hugging Face id or path; default: the embedded model")
    parser.add_argument("--cap", default="20MiB")
    parser.add_argument("--policy", default="am-halving")
    parser.add_argument("--tokens", type=positive, default=500)
    given = parser.parse_args()

    model, tokenizer = models.load(given.model)
    question = "Explain how a tower clock works, part by part, and why each part is there."
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    with agentmem.capped(model, cap=given.cap, policy=given.policy, tokenizer=tokenizer) as memory:
        output = model.generate(
            **inputs, past_key_values=memory, max_new_tokens=given.tokens, min_new_tokens=given.tokens, do_sample=False
        )

    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    report = memory.report()
    print(f"\n{report.num_compactions} compaction(s), each down to {memory.plan.target} slots per head")
    print(f"peak {format_bytes(report.peak_bytes)} of a cap of {format_bytes(report.cap_bytes)}")


if __name__ == "__main__":
    run(main)
