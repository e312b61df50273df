"""How configurations are computed: their states, scores and texts, from which weights and in which memory."""
