"""One page per search that a person clicks through: a self-contained HTML file, drawn from a result folder.

account.py   reads and checks a result folder                           -> Account
story.py     who descended from whom, what became of every candidate    -> Story
memory.py    what the shown lineage remembered, chunk by chunk          -> Remembered
svg.py       geometry of charts, in plain numbers                       -> LineChart
pictures.py  three small frames of a candidate: kept by the search, read by the page
summary.py   sentences, facts, cost and settings
build.py     lays everything out for the templates in page/             -> Report
write.py     puts pages together: one result, or several with an index
page/        templates, style and script; `base.html` and `charts.html` serve other pages as well
"""
