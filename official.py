"""
The released layout: Microsoft's checkpoints in and out.

    load_official("BEATs_iter3_plus_AS2M.pt")       # -> Encoder, or Classifier if it is fine-tuned; model.load does the same
    export_official(model, path)                    # what their code reads, strictly

Names differ, q, k, v are one matrix here, and the table of relative positions, which all layers share, stands once.
(Released tokenizers: tokenizer.load_tokenizer, which reads its encoder with encoder_from_official.)
"""
import torch

from model import PATCH, CheckpointError, Classifier, Encoder, EncoderConfig, read_checkpoint

# our name -> official name, of the encoder and of a block
_NAMES = {
    "patch.weight": "patch_embedding.weight",
    "ln_patch.weight": "layer_norm.weight", "ln_patch.bias": "layer_norm.bias",
    "proj.weight": "post_extract_proj.weight", "proj.bias": "post_extract_proj.bias",
    "conv_position.weight_g": "encoder.pos_conv.0.weight_g", "conv_position.weight_v": "encoder.pos_conv.0.weight_v",
    "conv_position.bias": "encoder.pos_conv.0.bias",
    "ln.weight": "encoder.layer_norm.weight", "ln.bias": "encoder.layer_norm.bias",
}
_BLOCK_NAMES = {f"{ours}.{p}": f"{theirs}.{p}" for p in ("weight", "bias") for ours, theirs in {
    "attn.out": "self_attn.out_proj", "attn.gate": "self_attn.grep_linear",
    "ln1": "self_attn_layer_norm", "fc1": "fc1", "fc2": "fc2", "ln2": "final_layer_norm"}.items()}

def encoder_to_official(encoder: Encoder) -> tuple[dict, dict]:
    """(cfg, state_dict) in the released layout; the shared bias table is repeated under every layer, as there."""
    ours, cfg = encoder.state_dict(), encoder.cfg
    theirs = {theirs: ours[name] for name, theirs in _NAMES.items() if name in ours}
    theirs["patch_embedding.weight"] = theirs["patch_embedding.weight"].view(-1, 1, PATCH, PATCH)
    for i in range(cfg.layers):
        a, b = f"blocks.{i}.", f"encoder.layers.{i}."
        theirs |= {b + new: ours[a + old] for old, new in _BLOCK_NAMES.items()}
        theirs[b + "self_attn.grep_a"] = ours[a + "attn.gate_scale"].view(1, -1, 1, 1)
        theirs[b + "self_attn.relative_attention_bias.weight"] = ours["position_bias.table"]
        for p in ("weight", "bias"):
            for name, part in zip("qkv", ours[a + "attn.qkv." + p].chunk(3)):
                theirs[b + f"self_attn.{name}_proj.{p}"] = part
    return dict(
        input_patch_size=PATCH, embed_dim=cfg.patch_dim, conv_bias=False, encoder_layers=cfg.layers,
        encoder_embed_dim=cfg.dim, encoder_ffn_embed_dim=cfg.ffn, encoder_attention_heads=cfg.heads,
        activation_fn="gelu", layer_wise_gradient_decay_ratio=cfg.grad_decay, layer_norm_first=False, deep_norm=True,
        dropout=cfg.dropout, attention_dropout=cfg.attention_dropout, activation_dropout=cfg.activation_dropout,
        encoder_layerdrop=cfg.layerdrop, dropout_input=cfg.input_dropout, conv_pos=cfg.conv_pos,
        conv_pos_groups=cfg.conv_groups, relative_position_embedding=True, num_buckets=cfg.buckets,
        max_distance=cfg.max_distance, gru_rel_pos=True,
    ), theirs

def encoder_from_official(cfg: dict, theirs: dict, path="checkpoint") -> Encoder:
    """Build an Encoder from the released layout. Takes its keys out of `theirs`: what stays there is not the encoder's."""
    wanted = dict(layer_norm_first=(False, False), deep_norm=(False, True), activation_fn=("gelu", "gelu"),
                  conv_bias=(False, False), relative_position_embedding=(False, True), gru_rel_pos=(False, True),
                  input_patch_size=(-1, PATCH))     # (the official class's default, what every released file has)
    for key, (default, value) in wanted.items():
        if cfg.get(key, default) != value:
            raise CheckpointError(f"{path}: {key}={cfg.get(key, default)!r} is not supported; every released file has {value!r}")
    try:
        shape = lambda key: theirs[key].shape
        layers = 1 + max(int(k.split(".")[2]) for k in theirs if k.startswith("encoder.layers."))
        dim, per_group, taps = shape("encoder.pos_conv.0.weight_v")
        buckets, heads = shape("encoder.layers.0.self_attn.relative_attention_bias.weight")
        encoder = Encoder(EncoderConfig(
            layers=layers, dim=dim, ffn=shape("encoder.layers.0.fc1.weight")[0], heads=heads,
            patch_dim=shape("patch_embedding.weight")[0], conv_pos=taps, conv_groups=dim // per_group,
            buckets=buckets, max_distance=cfg.get("max_distance", 1280),
            dropout=cfg.get("dropout", 0.1), attention_dropout=cfg.get("attention_dropout", 0.1),
            activation_dropout=cfg.get("activation_dropout", 0.0), input_dropout=cfg.get("dropout_input", 0.0),
            layerdrop=cfg.get("encoder_layerdrop", 0.0), grad_decay=cfg.get("layer_wise_gradient_decay_ratio", 1.0)))
        ours = {name: theirs.pop(key) for name, key in _NAMES.items() if name in encoder.state_dict()}
        ours["patch.weight"] = ours["patch.weight"].flatten(1)
        for i in range(layers):
            a, b = f"blocks.{i}.", f"encoder.layers.{i}."
            ours |= {a + old: theirs.pop(b + new) for old, new in _BLOCK_NAMES.items()}
            ours[a + "attn.gate_scale"] = theirs.pop(b + "self_attn.grep_a").flatten()
            ours["position_bias.table"] = theirs.pop(b + "self_attn.relative_attention_bias.weight")
            for p in ("weight", "bias"):
                ours[a + "attn.qkv." + p] = torch.cat([theirs.pop(b + f"self_attn.{n}_proj.{p}") for n in "qkv"])
    except KeyError as error:
        raise CheckpointError(f"{path}: not a released BEATs file: {error} is missing") from None
    try:
        encoder.load_state_dict(ours)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: tensors do not fit together: {error}") from None
    return encoder

def load_official(path, reorder=None, class_csv=None):
    """A released file -> Encoder, or Classifier if it is fine-tuned, in eval mode. Dimensions are read from the tensors.

    reorder="audioset" puts the classes in the order, and under the names, of class_csv (AudioSet's
    class_labels_indices.csv); by default they are MIDs in the file's own order.
    Strict: every key is used and none is missing. Raises CheckpointError.
    """
    if reorder not in (None, "audioset") or (reorder and not class_csv):
        raise ValueError('reorder is None or "audioset", which needs class_csv="class_labels_indices.csv"')
    ckpt = read_checkpoint(path)
    if "cfg" not in ckpt:
        raise CheckpointError(f"{path}: not an official checkpoint but one of ours; use load")
    cfg, rest = ckpt["cfg"], dict(ckpt["model"])
    if "quantize.embedding.weight" in rest:
        raise CheckpointError(f"{path}: this file is a tokenizer; use tokenizer.load_tokenizer")
    model = encoder = encoder_from_official(cfg, rest, path)
    if "predictor.weight" in rest:
        names = {int(k): v for k, v in ckpt.get("label_dict", {}).items()}
        model = Classifier(encoder, [names.get(i, str(i)) for i in range(len(rest["predictor.weight"]))],
                           dropout=cfg.get("predictor_dropout", 0.0))
        model.head.load_state_dict({"weight": rest.pop("predictor.weight"), "bias": rest.pop("predictor.bias")})
    if rest:
        raise CheckpointError(f"{path}: {len(rest)} unknown keys, {sorted(rest)[0]} the first")
    if reorder:
        if model is encoder:
            raise CheckpointError(f"{path}: this file has no classifier head, hence no classes to reorder")
        model.reorder(class_csv)
    return model.eval()

def export_official(model, path) -> None:
    """Write an Encoder or Classifier in the released layout, readable by Microsoft's code (strict)."""
    encoder = model.encoder if isinstance(model, Classifier) else model
    cfg, state = encoder_to_official(encoder)
    ckpt = {"cfg": cfg, "model": state}
    if isinstance(model, Classifier):
        cfg |= dict(finetuned_model=True, predictor_dropout=model.dropout.p, predictor_class=len(model.labels))
        state |= {"predictor.weight": model.head.weight.detach(), "predictor.bias": model.head.bias.detach()}
        ckpt["label_dict"] = dict(enumerate(model.labels))
    ckpt["model"] = {k: v.detach().float().contiguous().clone() for k, v in state.items()}
    torch.save(ckpt, path)
