"""The page's style sheet and its one small script, both scoped to the class `qlab`.

pytest-html's own rules are for bare tags (grey text, 12 px), so everything that matters is set.
"""

LIGHT = """
--bg:#fff;--card:#f7f8fa;--text:#1b1f24;--soft:#57606a;--line:#d8dee4;--head:#f1f3f6;
--good:#0f6b32;--good-bg:#e3f5e8;--bad:#b3151f;--bad-bg:#fdeaea;--accent:#0a58b8;--best:#0a58b8;
--c0:#0a66c2;--c1:#c2410c;--c2:#0f7b3f;--c3:#8b3fc7;--c4:#a16207;--c5:#b3156a;--c6:#0e7490;
--c7:#57606a;--h0:#7f1d1d;--h1:#c2410c;--h2:#e8923a;--h3:#f4cf74;--h4:#c9dfa0;--h5:#7fbf97;
--h6:#3a8fa0;--h7:#1d4f91;--none:#e6e9ed;
"""
DARK = """
--bg:#14171b;--card:#1b1f25;--text:#e6e9ed;--soft:#a0a8b2;--line:#333a43;--head:#20252c;
--good:#67d48b;--good-bg:#12301d;--bad:#ff8f8f;--bad-bg:#411a1d;--accent:#74b3ff;--best:#8fc2ff;
--c0:#63a9ff;--c1:#ff9a62;--c2:#5fd08a;--c3:#c79bff;--c4:#e0b64c;--c5:#ff85bd;--c6:#5cc8dd;
--c7:#a0a8b2;--h0:#b02a2a;--h1:#d9601f;--h2:#e8923a;--h3:#e9c765;--h4:#b5cd88;--h5:#6bad85;
--h6:#3a8fa0;--h7:#3568b5;--none:#2a3038;
"""

_CLASSES = "".join(
    f".qlab svg .h{i}{{fill:var(--h{i})}}.qlab svg .c{i}{{fill:var(--c{i});stroke:var(--c{i})}}"
    for i in range(8)
)
# pytest-html opens with a tall table of the environment; the benchmark goes before it.
_RULES = """
body:has(> .summary .qlab){display:flex;flex-direction:column}
body:has(> .summary .qlab)>:is(#environment-header,#environment){order:1;margin-top:12px}
.qlab{@LIGHT
color-scheme:light;box-sizing:border-box;background:var(--bg);color:var(--text);
font:14px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
text-align:left;margin:0 0 24px;padding:0}
@media (prefers-color-scheme:dark){.qlab-page .qlab{@DARK
color-scheme:dark}.qlab-page{background:#14171b}}
.qlab *{box-sizing:border-box}
.qlab h2,.qlab h3,.qlab p,.qlab dt,.qlab dd,.qlab caption{color:var(--text);font-family:inherit}
.qlab h2{font-size:24px;line-height:1.25;margin:0 0 4px;font-weight:650;letter-spacing:-.01em}
.qlab h3{font-size:16px;margin:32px 0 8px;font-weight:650}
.qlab p{margin:4px 0;font-size:14px}
.qlab .soft,.qlab p.soft{color:var(--soft)}
.qlab .facts{display:flex;flex-wrap:wrap;gap:2px 24px;margin:6px 0 10px;padding:0}
.qlab .facts div{display:flex;gap:6px}
.qlab .facts dt{color:var(--soft);font-weight:400}
.qlab .facts dd{margin:0}
.qlab .verdict{display:inline-block;border-radius:6px;padding:3px 10px;margin:6px 0;font-weight:600}
.qlab .verdict.ok{background:var(--good-bg);color:var(--good)}
.qlab .verdict.bad{background:var(--bad-bg);color:var(--bad)}
.qlab .scroll{overflow-x:auto;border:1px solid var(--line);border-radius:8px;margin:12px 0 6px}
.qlab table{border-collapse:separate;border-spacing:0;width:100%;font-size:13px;
color:var(--text);font-variant-numeric:tabular-nums lining-nums;background:var(--bg)}
.qlab caption{text-align:left;padding:8px 12px;color:var(--soft);font-size:12.5px}
.qlab th,.qlab td{padding:6px 10px;text-align:right;vertical-align:top;white-space:nowrap;
border:0;border-top:1px solid var(--line)}
.qlab thead th{background:var(--head);font-weight:600;vertical-align:bottom;white-space:normal;
line-height:1.25}
.qlab thead tr.groups th{border-bottom:0;color:var(--soft);font-weight:500;font-size:11.5px;
text-align:left;padding:5px 10px 0}
.qlab .group{border-left:1px solid var(--line)}
.qlab thead .unit{display:block;color:var(--soft);font-weight:400;font-size:11.5px}
.qlab tbody th{font-weight:600;text-align:left}
.qlab th.name,.qlab td.text{text-align:left}
.qlab td.wrap{white-space:normal;overflow-wrap:anywhere;min-width:16em}
.qlab table.main th.name{position:sticky;left:0;background:var(--bg);z-index:1}
.qlab table.main thead th.name{background:var(--head)}
.qlab tr.baseline th,.qlab tr.baseline td{background:var(--card);color:var(--soft)}
.qlab table.main tr.baseline th.name{background:var(--card)}
.qlab tbody tr:hover td,.qlab table.main tbody tr:hover th{background:var(--head)}
.qlab .sub{display:block;font-size:11px;line-height:1.3;color:var(--soft);font-weight:400}
.qlab td.absent{color:var(--soft)}
.qlab td.best>.v{color:var(--best);font-weight:700;border-bottom:2px solid var(--best)}
.qlab td.kept,.qlab tbody tr:hover td.kept{background:var(--good-bg)}
.qlab td.broken,.qlab tbody tr:hover td.broken{background:var(--bad-bg)}
.qlab .kept .judged,.qlab .ok{color:var(--good)}
.qlab .broken .judged,.qlab .bad{color:var(--bad)}
.qlab .judged{font-weight:600}
.qlab .error{color:var(--bad);white-space:normal;text-align:left;overflow-wrap:anywhere}
.qlab sup{line-height:0;font-size:.8em;color:var(--soft)}
.qlab .sort{all:unset;cursor:pointer;display:inline;font:inherit;color:inherit}
.qlab .sort:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
.qlab thead th[data-c]{position:relative}
.qlab table.main thead th.name{position:sticky}
.qlab .sort::after{content:"";position:absolute;right:1px;bottom:11px;border:4px solid transparent;
border-top-color:var(--line)}
.qlab .sort:hover::after{border-top-color:var(--soft)}
.qlab [aria-sort=ascending] .sort::after{border-color:transparent;
border-bottom-color:var(--accent);bottom:14px}
.qlab [aria-sort=descending] .sort::after{border-color:transparent;border-top-color:var(--accent)}
.qlab .notes{margin:6px 0;padding:0;list-style:none;font-size:12.5px;color:var(--soft)}
.qlab .notes li{margin:2px 0}
.qlab .plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(600px,100%),1fr));
gap:0 24px;align-items:start}
.qlab .sheets{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(340px,100%),1fr));
gap:0 16px;align-items:start}
.qlab .sheets td.wrap{min-width:0}
.qlab .problems{margin:4px 0 8px;padding:0 0 0 20px;font-size:14px}
.qlab figure{margin:12px 0;padding:12px;border:1px solid var(--line);border-radius:8px;
background:var(--bg);overflow-x:auto}
.qlab figcaption{color:var(--soft);font-size:12.5px;margin-top:4px}
.qlab svg{display:block;width:100%;max-width:980px;height:auto;min-width:520px;
font:11.5px system-ui,
-apple-system,"Segoe UI",Roboto,Arial,sans-serif}
.qlab svg text{fill:var(--text)}
.qlab svg .soft{fill:var(--soft)}
.qlab svg text.bad{fill:var(--bad)}
.qlab svg .grid{stroke:var(--line);stroke-width:1}
.qlab svg .front{fill:none;stroke:var(--soft);stroke-width:1.25;stroke-dasharray:3 3}
.qlab svg .limit{stroke:var(--bad);stroke-width:1.25;stroke-dasharray:7 4}
.qlab svg .leader{stroke:var(--soft);stroke-width:.75}
.qlab svg .halo{paint-order:stroke;stroke:var(--bg);stroke-width:3px;stroke-linejoin:round}
@CLASSES
.qlab svg .hn{fill:var(--none)}
.qlab details{margin:12px 0;border:1px solid var(--line);border-radius:8px;padding:8px 12px}
.qlab summary{cursor:pointer;font-weight:600;color:var(--text)}
.qlab pre{white-space:pre-wrap;overflow-wrap:anywhere;font:12px/1.45 ui-monospace,SFMono-Regular,
Menlo,Consolas,monospace;background:var(--card);color:var(--text);
padding:8px 10px;border-radius:6px;
margin:6px 0;max-height:24em;overflow:auto}
.qlab code{font:12px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.qlab .hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);
white-space:nowrap}
.qlab-page{margin:0}
.qlab-page .qlab{max-width:1480px;margin:0 auto;padding:28px 28px 48px}
@media print{.qlab,.qlab-page .qlab{@LIGHT
max-width:none;padding:0;font-size:10px;print-color-adjust:exact;-webkit-print-color-adjust:exact}
.qlab table{font-size:9px}.qlab th,.qlab td{padding:3px 4px}.qlab .sub,.qlab thead .unit,
.qlab thead tr.groups th,.qlab caption{font-size:8px}
.qlab p,.qlab .problems,.qlab .notes,.qlab figcaption,.qlab .facts{font-size:10px}
.qlab h3{break-after:avoid}.qlab .plots{grid-template-columns:1fr 1fr}
.qlab .scroll,.qlab figure{overflow:visible}.qlab .sort::after{display:none}
.qlab table.main th.name{position:static}.qlab pre{max-height:none}
.qlab figure,.qlab tr{break-inside:avoid}.qlab svg{min-width:0}
.qlab details::details-content{content-visibility:visible;height:auto}}
"""
STYLE = _RULES.replace("@LIGHT", LIGHT).replace("@DARK", DARK).replace("@CLASSES", _CLASSES)

# Sorts by data-v: numbers as numbers; what is absent comes last in either direction.
SCRIPT = """
(function(){
document.querySelectorAll('.qlab table.sortable').forEach(function(table){
  var body=table.tBodies[0],rows=Array.from(body.rows);
  function key(row,column){
    var cell=Array.from(row.cells).find(function(c){return c.dataset.c===column});
    return cell&&cell.dataset.v!==undefined&&cell.dataset.v!==''?cell.dataset.v:null;
  }
  table.querySelectorAll('thead th[data-c]').forEach(function(head){
    var button=document.createElement('button');
    button.type='button';button.className='sort';
    while(head.firstChild)button.appendChild(head.firstChild);
    head.appendChild(button);
    button.addEventListener('click',function(){
      var first=head.dataset.first||'ascending';
      var other={ascending:'descending',descending:'ascending'};
      var way=head.getAttribute('aria-sort')?other[head.getAttribute('aria-sort')]:first;
      table.querySelectorAll('thead th[aria-sort]').forEach(function(h){
        h.removeAttribute('aria-sort')});
      head.setAttribute('aria-sort',way);
      var sign=way==='ascending'?1:-1,text=head.dataset.kind==='text';
      rows.slice().sort(function(a,b){
        var x=key(a,head.dataset.c),y=key(b,head.dataset.c);
        if(x===null||y===null)return (x===null)-(y===null)||rows.indexOf(a)-rows.indexOf(b);
        var d=text?x.localeCompare(y):(+x===+y?0:+x<+y?-1:1);
        return sign*d||rows.indexOf(a)-rows.indexOf(b);
      }).forEach(function(row){body.appendChild(row)});
    });
  });
});
addEventListener('beforeprint',function(){
  document.querySelectorAll('.qlab details').forEach(function(d){d.open=true});
});
})();
"""
