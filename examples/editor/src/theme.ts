/** The editor's colours, from the page's: they follow light and dark by themselves. */
import { HighlightStyle, syntaxHighlighting } from '@codemirror/language'
import { tags } from '@lezer/highlight'
import { EditorView } from 'codemirror'

export const look = [
  EditorView.theme({
    '&': { height: '100%', color: 'var(--text)', backgroundColor: 'var(--back)' },
    '.cm-scroller': { fontFamily: 'var(--mono)', fontSize: '13px' },
    '.cm-gutters': { color: 'var(--dim)', backgroundColor: 'var(--back)', border: 'none' },
    '.cm-content': { caretColor: 'var(--text)' },
    '.cm-cursor': { borderLeftColor: 'var(--text)' },
    '.cm-activeLine, .cm-activeLineGutter': { backgroundColor: 'var(--raised)' },
    '&.cm-focused .cm-selectionBackground, .cm-selectionBackground': { backgroundColor: 'var(--selected)' },
  }),
  syntaxHighlighting(
    HighlightStyle.define([
      { tag: [tags.keyword, tags.tagName, tags.operatorKeyword], color: 'var(--keyword)' },
      { tag: [tags.string, tags.regexp, tags.attributeValue], color: 'var(--string)' },
      { tag: [tags.number, tags.bool, tags.null], color: 'var(--number)' },
      { tag: tags.comment, color: 'var(--dim)' },
      { tag: [tags.definition(tags.variableName), tags.function(tags.variableName), tags.typeName, tags.attributeName], color: 'var(--name)' },
    ]),
  ),
]
