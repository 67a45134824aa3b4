"""Back-ends that others wrote, and ours, put through the conformance suite: what docs/conformance-results.md says.

``tools/results`` is the way in. ``table`` says who is tried, ``debian`` where programs come from, ``run`` tries them,
``page`` writes.
"""
