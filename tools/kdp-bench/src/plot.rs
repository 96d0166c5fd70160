//! Plots as SVG, to stand inside an HTML page.
//!
//! Series differ by their marks, not only by their colours, and each plot has its figures as text for those who do
//! not see it.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::Error;

/// Colours that people with any kind of colour vision tell apart (Okabe and Ito).
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(90, 90, 90),
    RGBColor(0, 0, 0),
];

const WIDTH: u32 = 860;
const LEGEND: i32 = 215;
const INK: RGBColor = RGBColor(34, 34, 34);

/// How values are placed along an axis.
#[derive(Clone, Copy)]
pub enum Scale {
    Linear,
    Log2,
    Log10,
}

impl Scale {
    fn place(self, value: f64) -> f64 {
        match self {
            Self::Linear => value,
            Self::Log2 => value.log2(),
            Self::Log10 => value.log10(),
        }
    }

    fn value(self, place: f64) -> f64 {
        match self {
            Self::Linear => place,
            Self::Log2 => place.exp2(),
            Self::Log10 => 10_f64.powf(place),
        }
    }

    /// What the axis spans, and how many labels it has at most.
    fn span(self, values: impl Iterator<Item = f64>) -> (f64, f64, usize) {
        let places = values.map(|value| self.place(value));
        let [low, high] = crate::stats::range(places);
        match self {
            Self::Linear => (0.0, (high * 1.05).max(f64::MIN_POSITIVE), 8),
            Self::Log2 | Self::Log10 => {
                let (low, high) = (low.floor(), high.ceil().max(low.floor() + 1.0));
                (low, high, (high - low) as usize + 1)
            }
        }
    }
}

/// A line of a plot.
pub struct Series {
    /// Its colour and its mark.
    pub style: usize,
    pub label: String,
    pub points: Vec<(f64, f64)>,
}

/// An axis.
pub struct Axis {
    pub text: &'static str,
    pub scale: Scale,
    /// How its labels are written.
    pub label: fn(f64) -> String,
}

/// A bar, and what stands at its end.
pub struct Bar {
    /// Its colour.
    pub style: usize,
    pub label: String,
    pub value: f64,
    pub text: String,
}

/// What people are told who do not see the plot.
pub struct Alt {
    /// Unique in the page.
    pub id: String,
    pub title: String,
    pub text: String,
}

/// Lines with marks.
pub fn lines(alt: &Alt, x: &Axis, y: &Axis, all: &[Series]) -> Result<String, Error> {
    let height = 380.max(60 + 20 * all.len() as u32);
    draw(alt, height, |root| {
        let (left, right) = root.split_horizontally(WIDTH as i32 - LEGEND);
        let points = || all.iter().flat_map(|series| &series.points);
        let (x_low, x_high, x_labels) = x.scale.span(points().map(|p| p.0));
        let (y_low, y_high, y_labels) = y.scale.span(points().map(|p| p.1));
        let mut chart = ChartBuilder::on(&left)
            .margin(10)
            .x_label_area_size(45)
            .y_label_area_size(75)
            .build_cartesian_2d(x_low..x_high, y_low..y_high)?;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .bold_line_style(RGBColor(215, 215, 215))
            .axis_style(INK)
            .label_style(font(13))
            .axis_desc_style(font(14))
            .x_desc(x.text)
            .y_desc(y.text)
            .x_labels(x_labels)
            .y_labels(y_labels)
            .x_label_formatter(&|place| (x.label)(x.scale.value(*place)))
            .y_label_formatter(&|place| (y.label)(y.scale.value(*place)))
            .draw()?;
        for (n, series) in all.iter().enumerate() {
            let place = |&(a, b): &(f64, f64)| (x.scale.place(a), y.scale.place(b));
            let colour = COLOURS[series.style % COLOURS.len()];
            let style = colour.stroke_width(2);
            chart.draw_series(LineSeries::new(series.points.iter().map(place), style))?;
            let marks = series.points.iter().map(place);
            chart.draw_series(marks.map(|at| mark(series.style, at)))?;
            let y = 24 + 20 * n as i32;
            right.draw(&PathElement::new(vec![(4, y), (34, y)], style))?;
            right.draw(&mark(series.style, (19, y)))?;
            right.draw(&Text::new(series.label.clone(), (42, y), left_text(13)))?;
        }
        Ok(())
    })
}

/// Bars from left to right. Values that are worlds apart are on a logarithmic scale, which the caller's text says.
pub fn bars(alt: &Alt, bars: &[Bar], scale: Scale) -> Result<String, Error> {
    const LABEL: i32 = 190;
    const TEXT: i32 = 270;
    const STEP: i32 = 30;
    draw(alt, (bars.len() as i32 * STEP + 12) as u32, |root| {
        let [least, greatest] = crate::stats::range(bars.iter().map(|bar| bar.value));
        let (low, high) = match scale {
            Scale::Linear => (0.0, greatest),
            // Half a power below the least, so that it has a bar, too.
            _ => (scale.place(least) - 0.5, scale.place(greatest)),
        };
        let room = f64::from(WIDTH as i32 - LABEL - TEXT);
        for (n, bar) in bars.iter().enumerate() {
            let top = 6 + n as i32 * STEP;
            let part = (scale.place(bar.value) - low) / (high - low);
            let end = LABEL + (part * room).round().max(1.0) as i32;
            let colour = COLOURS[bar.style % COLOURS.len()];
            root.draw(&Rectangle::new(
                [(LABEL, top), (end, top + STEP - 8)],
                colour.filled(),
            ))?;
            let middle = top + (STEP - 8) / 2;
            let right = font(14).pos(Pos::new(HPos::Right, VPos::Center));
            root.draw(&Text::new(bar.label.clone(), (LABEL - 8, middle), right))?;
            let text = Text::new(bar.text.clone(), (end + 8, middle), left_text(14));
            root.draw(&text)?;
        }
        Ok(())
    })
}

type Root<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

fn draw(alt: &Alt, height: u32, with: impl FnOnce(&Root) -> Drawn) -> Result<String, Error> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        with(&root)
            .and_then(|()| Ok(root.present()?))
            .map_err(|e| Error::Plot(format!("{}: {e}", alt.title)))?;
    }
    let broken = || Error::Plot(format!("{}: what was drawn is no SVG", alt.title));
    let start = svg.find("<svg").ok_or_else(broken)?;
    let end = start + svg[start..].find('>').ok_or_else(broken)?;
    // Inside a page it needs no name space, but a title, and no fixed size.
    let (id, title, text) = (&alt.id, escape(&alt.title), escape(&alt.text));
    Ok(format!(
        "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-labelledby=\"{id}-title {id}-text\">\n\
         <title id=\"{id}-title\">{title}</title>\n<desc id=\"{id}-text\">{text}</desc>{}",
        &svg[end + 1..]
    ))
}

/// Series of one colour, whose styles are as many apart as there are colours, have different marks.
fn mark<'a, C: Clone + 'static>(style: usize, at: C) -> DynElement<'static, SVGBackend<'a>, C> {
    let colour = COLOURS[style % COLOURS.len()];
    match (style + style / COLOURS.len()) % 4 {
        0 => Circle::new(at, 4, colour.filled()).into_dyn(),
        1 => TriangleMarker::new(at, 6, colour.filled()).into_dyn(),
        2 => Cross::new(at, 4, colour.stroke_width(2)).into_dyn(),
        _ => Circle::new(at, 4, colour.stroke_width(2)).into_dyn(),
    }
}

fn font(size: i32) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&INK)
}

fn left_text(size: i32) -> TextStyle<'static> {
    font(size).pos(Pos::new(HPos::Left, VPos::Center))
}

/// Text inside a page.
pub fn escape(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            c => out.push(c),
        }
    }
    out
}
