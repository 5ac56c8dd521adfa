"""Streams arrays through metrics of samples."""


def measured(metric, x, labels=None, *, batch_size=97):
    """Returns the values of a metric for samples `x` in batches."""
    state = metric.init()
    for start in range(0, len(x), batch_size):
        part = slice(start, start + batch_size)
        state = metric.update(state, x[part], {} if labels is None else {"label": labels[part]})
    values = metric.result(state)
    assert tuple(values) == metric.names and metric.kind == "samples"
    return values
