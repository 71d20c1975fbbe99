package main

// An object is a JSON object; its members are written in the order of their names.
type object = map[string]any

// gridWidth is how wide Grafana's grid is.
const gridWidth = 24

// grafana is the dashboard in Grafana's JSON model.
func grafana(rows []row) object {
	var panels []object
	y := 0
	for _, r := range rows {
		panels = append(panels, object{
			"id": len(panels) + 1, "type": "row", "title": r.title, "collapsed": false, "panels": []object{},
			"gridPos": place(0, y, gridWidth, 1),
		})
		y++
		x, height := 0, 0
		for _, p := range r.panels {
			if x+p.width > gridWidth {
				x, y, height = 0, y+height, 0
			}
			panels = append(panels, p.json(len(panels)+1, x, y))
			x, height = x+p.width, max(height, p.height)
		}
		y += height
	}
	return object{
		"uid": "nix-dispatch", "title": "nix-dispatch", "tags": []string{"nix"},
		"description":   "Load of the machines that nix-dispatchd builds on.",
		"schemaVersion": 39, "version": 1, "editable": true,
		"refresh": "30s", "time": object{"from": "now-6h", "to": "now"},
		"annotations": object{"list": []object{}}, "links": []object{},
		"panels":     panels,
		"templating": object{"list": variables()},
	}
}

func place(x, y, w, h int) object { return object{"x": x, "y": y, "w": w, "h": h} }

// source is the data source that was chosen above the dashboard.
var source = object{"type": "prometheus", "uid": "${datasource}"}

func variables() []object {
	choice := func(name, label, expr string) object {
		return object{
			"type": "query", "name": name, "label": label, "datasource": source,
			"query":      object{"query": expr, "refId": name},
			"definition": expr, "refresh": 2, "sort": 1,
			"multi": true, "includeAll": true, "allValue": ".*",
			"current": object{"text": []string{"All"}, "value": []string{"$__all"}},
		}
	}
	return []object{
		{"type": "datasource", "name": "datasource", "label": "Data source", "query": "prometheus"},
		choice("instance", "Host", `label_values(nix_dispatch_build_info, instance)`),
		choice("machine", "Machine", `label_values(nix_dispatch_machine_slots{instance=~"$instance"}, machine)`),
	}
}

func (p panel) json(id, x, y int) object {
	var targets []object
	for n, q := range p.queries {
		t := object{"refId": string(rune('A' + n)), "expr": q.expr, "legendFormat": q.legend, "datasource": source}
		if p.kind == table {
			t["format"], t["instant"] = "table", true
		}
		targets = append(targets, t)
	}
	out := object{
		"id": id, "type": string(p.kind), "title": p.title, "description": p.help,
		"datasource": source, "gridPos": place(x, y, p.width, p.height),
		"targets": targets, "options": p.options(),
		"fieldConfig": object{"defaults": p.field(), "overrides": []object{}},
	}
	if p.kind == table {
		out["transformations"] = []object{{"id": "organize", "options": object{
			"excludeByName": object{"Time": true, "Value": true},
		}}}
	}
	return out
}

// field says how values are shown.
func (p panel) field() object {
	field := object{"unit": p.unit, "min": 0, "thresholds": object{"mode": "absolute", "steps": p.steps()}}
	switch p.kind {
	case series:
		stacking := "none"
		if p.stacked {
			stacking = "normal"
		}
		field["color"] = object{"mode": "palette-classic"}
		field["custom"] = object{
			"drawStyle": "line", "lineWidth": 1, "fillOpacity": 15, "showPoints": "never", "spanNulls": false,
			"stacking": object{"mode": stacking, "group": "A"},
		}
	case timeline:
		field["color"] = object{"mode": "thresholds"}
		field["custom"] = object{"lineWidth": 0, "fillOpacity": 80}
	default:
		field["color"] = object{"mode": "thresholds"}
	}
	return field
}

// steps are the colours, by value.
func (p panel) steps() []object {
	step := func(color string, from any) object { return object{"color": color, "value": from} }
	if p.below {
		return []object{step("red", nil), step("green", p.red)}
	}
	steps := []object{step("green", nil)}
	if p.amber != 0 {
		steps = append(steps, step("orange", p.amber))
	}
	if p.red != 0 {
		steps = append(steps, step("red", p.red))
	}
	return steps
}

func (p panel) options() object {
	switch p.kind {
	case stat:
		return object{
			"colorMode": "value", "graphMode": "area", "textMode": "value",
			"reduceOptions": object{"calcs": []string{"lastNotNull"}, "fields": "", "values": false},
		}
	case series:
		return object{
			"legend":  object{"displayMode": "list", "placement": "bottom", "showLegend": true},
			"tooltip": object{"mode": "multi", "sort": "desc"},
		}
	case timeline:
		return object{"mergeValues": true, "showValue": "never", "rowHeight": 0.8}
	default:
		return object{"showHeader": true}
	}
}
