"""The network under repair: its layers, their weights as one vector, and gradients with respect to them.

In: a module and layer names. Out: `LayerRef` and `ParameterSpace`, and per-sample gradients of a layer's weights.
"""
