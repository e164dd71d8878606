"""What is added to a Llama, by peft, and how bitsandbytes holds the rest."""

import re

import torch
from models import Twin
from problems import Refused

MATRICES = {"q_proj": "attn", "k_proj": "attn", "v_proj": "attn", "o_proj": "attn"}  # -> where ours has it
MATRICES |= {"gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp"}
NF4_BLOCK, ABSMAX_BLOCK = 64, 256  # elements that share a scale; scales that share one


def fine_tuned(twin: Twin, f: dict, model: dict, device: str, fake: bool) -> Twin:
    """The twin with what FinetuneConfig's fields `f` add, and only that trained.

    Matrices in NF4 are those of the layers, as QLoRA has them; embedding, norms and head stay in model.param_dtype. peft's
    prepare_model_for_kbit_training would make them fp32, which no recipe of ours asks for and would cost gigabytes.
    """
    import peft

    if f["base"] == "nf4":
        _quantise(twin, model["dtype"], device, fake)
    for parameter in twin.model.parameters():
        parameter.requires_grad_(False)
    with torch.device(device):
        if f["method"] == "lora":
            adapted = peft.get_peft_model(twin.model, _lora(peft, f))
        else:
            adapted = peft.get_peft_model(twin.model, _adapter(peft, f, model))
        if f["method"] == "adapter_v2":
            _second_version(adapted)
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # peft does so for LoRA alone; optimizers want it
            parameter.data = parameter.data.float()
    twin.model = adapted
    twin.loss = lambda b: adapted(input_ids=b["input_ids"], labels=b["input_ids"]).loss
    if f["method"].startswith("adapter"):
        L, prompts = model["n_layer"], f["prompt_length"] * model["n_embd"]
        gates = model["n_head"] if f["gate"] == "head" else 1
        twin.extra += (L - f["first_layer"]) * (prompts + 1) - L * (prompts + gates)
        why = [twin.difference] if twin.difference else []
        why += ["ours has prompts in every layer, used or not"] if f["first_layer"] else []
        why += ["a gate for each head where peft has one a layer"] if gates > 1 else []
        twin.difference = "; ".join(why)
    return twin


def _second_version(adapted) -> None:
    """What LLaMA-Adapter v2 adds, which peft has not: scales and biases of every matrix of a layer, and trained norms."""

    def rescaled(linear, _, y):
        return linear.adapter_scale.to(y.dtype) * (y + linear.adapter_bias.to(y.dtype))  # in its dtype, as LitGPT does

    for name, module in list(adapted.named_modules()):
        if name.rpartition(".")[2] in MATRICES:
            module.adapter_scale = torch.nn.Parameter(torch.ones(module.out_features))
            module.adapter_bias = torch.nn.Parameter(torch.zeros(module.out_features))
            module.register_forward_hook(rescaled)
        elif type(module).__name__.endswith("RMSNorm"):
            module.weight.requires_grad_(True)


def _lora(peft, f: dict):
    names = [name for name, part in MATRICES.items() if re.fullmatch(f["targets"], f"h/{part}/{name}")]
    if not names:
        raise Refused(f"finetune.targets={f['targets']!r} matches no matrix of a layer")
    return peft.LoraConfig(
        r=f["rank"], lora_alpha=f["alpha"], lora_dropout=f["dropout"], use_dora=f["dora"],
        use_rslora=f["rank_stabilised"], target_modules=names, task_type="CAUSAL_LM",
    )  # fmt: skip


def _adapter(peft, f: dict, model: dict):
    layers = model["n_layer"] - f["first_layer"]
    return peft.AdaptionPromptConfig(adapter_len=f["prompt_length"], adapter_layers=layers, task_type="CAUSAL_LM")


def _quantise(twin: Twin, compute_dtype: str, device: str, fake: bool) -> None:
    """Every matrix of a layer becomes bitsandbytes' Linear4bit with double quantisation."""
    from bitsandbytes.nn import Linear4bit

    dtype = getattr(torch, compute_dtype)
    for name, linear in list(twin.model.named_modules()):
        if name.rpartition(".")[2] not in MATRICES:
            continue
        options = {"bias": linear.bias is not None, "compute_dtype": dtype, "quant_type": "nf4"}
        if fake:
            layer = _fake_linear4bit(Linear4bit, linear, options, device)
        else:
            layer = Linear4bit(linear.in_features, linear.out_features, **options)
            layer.load_state_dict({key: value.cpu() for key, value in linear.state_dict().items()})
            layer = layer.to(device)  # which quantises
        twin.model.set_submodule(name, layer)
        state = layer.weight.quant_state
        twin.held += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        twin.packed += linear.weight.numel() - layer.weight.numel()
    twin.model.is_loaded_in_4bit = True  # so that peft wraps them as what they are


def _fake_linear4bit(Linear4bit, linear, options: dict, device: str):
    """The true Linear4bit, whose products bitsandbytes can follow on fake tensors; what cannot run there is quantising.

    Its arrays are made by their sizes: half a byte an element, a scale in a byte for 64, one in fp32 for 64 x 256.
    """
    from bitsandbytes.functional import QuantState
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():  # its parameter is a subclass of tensors, as are fake ones: it cannot be both
        layer = Linear4bit(linear.in_features, linear.out_features, device="meta", **options)
    empty = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=device)
    scales = -(-linear.weight.numel() // NF4_BLOCK)
    state = QuantState(
        absmax=empty(scales, dtype=torch.uint8),
        shape=linear.weight.shape,
        code=empty(16),
        blocksize=NF4_BLOCK,
        quant_type="nf4",
        dtype=linear.weight.dtype,
        offset=empty(),
        state2=QuantState(
            absmax=empty(-(-scales // ABSMAX_BLOCK)), code=empty(256), blocksize=ABSMAX_BLOCK, dtype=torch.float32
        ),
    )
    codes = empty(-(-linear.weight.numel() // 2), 1, dtype=torch.uint8)
    layer.weight = torch.nn.Parameter(codes, requires_grad=False)
    layer.weight.quant_state = layer.quant_state = state
    layer.weight.compress_statistics, layer.weight.quant_type = True, "nf4"  # which peft reads
    if linear.bias is not None:
        layer.bias = torch.nn.Parameter(torch.empty_like(linear.bias), requires_grad=False)
    return layer
