"""What an engine sampled, against one forward of the same weights in float64 over all that it sampled."""

import copy

import torch

from perilune.engine.sampling import counter_uniforms, sample_keys


def misses(model, requests, completions):
    """How far every sampled token is from what float64 gives after the same tokens.

    Requests must not truncate, nor change the logits.

    Returns:
        `[T]` float64 each, for the tokens of all completions in order: the error of the reported log-probability, and
        how much the model would have to differ for the token to be the one: of a draw, the distance of its uniform
        number from the token's share of the cumulative distribution; of a greedy choice, what its log-probability
        lacks. A near tie is a small miss, whichever token was taken.
    """
    by_id = {request.id: request for request in requests}
    texts = [[*by_id[c.request_id].prompt_ids, *c.token_ids] for c in completions]
    device = model.output_weight.device
    starts = torch.tensor([0, *map(len, texts)]).cumsum(0)
    wide = copy.deepcopy(model).double().eval()
    with torch.inference_mode():
        logits = wide(
            torch.tensor([token for text in texts for token in text], device=device), starts.int().to(device)
        ).cpu()
    errors, places = [], []
    for completion, end in zip(completions, starts[1:].tolist(), strict=True):
        params, count = by_id[completion.request_id].params, len(completion.token_ids)
        tokens = torch.tensor(completion.token_ids)[:, None]
        scaled = logits[end - count - 1 : end - 1] / (params.temperature or 1.0)
        wanted = scaled.log_softmax(-1)
        found = wanted.gather(1, tokens)[:, 0]
        errors.append((torch.tensor(completion.logprobs, dtype=torch.float64) - found).abs())
        if params.temperature:
            keys = sample_keys(torch.tensor([params.seed]), torch.tensor([completion.sample])).expand(count)
            uniforms = counter_uniforms(keys, torch.arange(count))
            after = wanted.exp().cumsum(-1).gather(1, tokens)[:, 0]
            places.append(torch.maximum(after - found.exp() - uniforms, uniforms - after).clamp(min=0))
        else:
            places.append(wanted.amax(-1) - found)
    return torch.cat(errors), torch.cat(places)
