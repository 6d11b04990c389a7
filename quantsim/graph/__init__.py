"""What a traced model is: the trace, the roles of its nodes, and where quantizers go."""
