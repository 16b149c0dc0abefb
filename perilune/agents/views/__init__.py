"""Looking at runs: in a terminal, in a browser, and as files that go elsewhere.

model    what every view shows: agents as they stand, and events without their long texts
transcript  all that an agent was told, said and did
text     trees, critical paths, costs and differences of runs for the command line
steps    a run a step at a time
web      pages and a stream of events for `perilune.serve`
page     the same page as one text, with or without a run's data in it
export   JSONL, self-contained HTML, OTLP/JSON
tui      a terminal that follows a run and steers it; board: what it shows; dialogs: what it asks

Everything shown is in the journal too. What models and tools said is data: it is escaped wherever it is shown.
"""
