"""One page per search that a person clicks through: a self-contained HTML file, drawn from a result folder.

  account.py   reads and checks a result folder                           -> Account
  story.py     who descended from whom, what became of every candidate    -> Story
  memory.py    what the shown lineage remembered, chunk by chunk          -> MemoryChart
  svg.py       geometry of charts, in plain numbers
  pictures.py  three small frames of a candidate: kept by the search, read by the page
  build.py     lays everything out for the templates in page/
"""
