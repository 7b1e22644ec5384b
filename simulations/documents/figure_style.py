"""The colours and letters of all figures, for light and dark screens."""

STYLE = """\
<style>
  .page { fill: #ffffff; } .grid { stroke: #d5dbe3; } .mean { fill: #6b7a8c; } .lead { fill: #0b57a4; }
  .dot { fill: #ffffff; stroke: #16202b; stroke-width: 1.2; } .trend { stroke: #0b57a4; fill: none; }
  text { fill: #16202b; font: 13px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
  .head { font-weight: 600; font-size: 14px; } .note { fill: #536170; font-size: 12px; } .first { font-weight: 600; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0e141b; } .grid { stroke: #33404e; } .mean { fill: #8b9bad; } .lead { fill: #8cc4ff; }
    .trend { stroke: #8cc4ff; }
    .dot { fill: #0e141b; stroke: #eef3f8; } text { fill: #eef3f8; } .note { fill: #b2bfcc; }
  }
</style>"""
