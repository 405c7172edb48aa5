"""Makes the adapter goldens: random adapters by `peft` on two of the goldens, and what `transformers` computes with them.

Run it where torch, transformers and peft are installed, after make_goldens.py: `python tests/models/make_peft_goldens.py`.
Each folder is named after its base and holds an adapter and `golden.npz` with `inputs` [2, L] and `logits` [2, L, V].
"""

import json
import pathlib

import numpy as np
import peft
import torch
import transformers

HERE = pathlib.Path(__file__).parent
ADAPTERS = {
    "llama3": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], "use_rslora": True},
    "gpt2": {"r": 2, "lora_alpha": 8, "target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True},
}


def main() -> None:
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        base = transformers.AutoModelForCausalLM.from_pretrained(HERE / "goldens" / name, attn_implementation="eager")
        model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "lora_" in parameter_name:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            inputs = np.load(HERE / "goldens" / name / "golden.npz")["inputs"]
            logits = model(torch.from_numpy(inputs).long()).logits.numpy()
        folder = HERE / "peft_goldens" / name
        model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = name  # not a path of this machine
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        np.savez_compressed(folder / "golden.npz", inputs=inputs, logits=logits)
        print(f"{name}: {sum(path.stat().st_size for path in folder.iterdir())} bytes")


if __name__ == "__main__":
    main()
