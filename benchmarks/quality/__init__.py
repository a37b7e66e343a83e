"""How well methods fine-tune: the same start, the same data, a learning-rate search of equal size, several seeds.

`setting` names one run, `store` remembers finished ones, `tasks` and `batches` bring the data, `methods` what trains,
`training` runs one setting, `search` decides which settings are run, `summary` turns them into tables and shares.
"""
