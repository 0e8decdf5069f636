import { indentWithTab } from '@codemirror/commands'
import type { Extension } from '@codemirror/state'
import { Compartment, EditorState } from '@codemirror/state'
import { keymap } from '@codemirror/view'
import { basicSetup, EditorView } from 'codemirror'
import { useEffect, useRef } from 'react'

import { edit, useProjectEditorStore as useStore } from './store.ts'
import { look } from './theme.ts'

const room = new Compartment() // of a file that somebody else has open, too
const states = new Map<string, EditorState>() // undo history and selection of each open file

/** Loads the language of a path only when a file of it is opened. */
export async function language(path: string): Promise<Extension> {
  const ending = path.split('.').at(-1) ?? ''
  if (/^[cm]?[jt]sx?$/.test(ending)) {
    const { javascript } = await import('@codemirror/lang-javascript')
    return javascript({ jsx: ending.endsWith('x'), typescript: ending.includes('t') })
  }
  if (ending === 'css') return (await import('@codemirror/lang-css')).css()
  if (['html', 'vue', 'svelte', 'astro'].includes(ending)) return (await import('@codemirror/lang-html')).html()
  if (ending === 'json') return (await import('@codemirror/lang-json')).json()
  if (ending === 'md') return (await import('@codemirror/lang-markdown')).markdown()
  return []
}

export function Code({ path }: { path: string }) {
  const place = useRef<HTMLDivElement>(null)
  const view = useRef<EditorView | null>(null)
  const leaveRoom = useRef<() => void>(null)
  const text = useStore((state) => state.docs.get(path)?.text ?? '')
  const goTo = useStore((state) => state.goTo)
  const shared = useStore((state) => state.others.has(path) || state.docs.get(path)?.shared === true)

  useEffect(() => {
    const known = states.get(path)
    const lang = new Compartment()
    const fresh = () =>
      EditorState.create({
        doc: useStore.getState().docs.get(path)?.text ?? '',
        extensions: [
          basicSetup,
          keymap.of([indentWithTab]),
          lang.of([]),
          room.of([]),
          look,
          EditorView.contentAttributes.of({ 'aria-label': path }),
          EditorView.updateListener.of((update) => {
            states.set(path, update.state)
            if (update.docChanged) edit(path, update.state.doc.toString())
          }),
        ],
      })
    const editor = new EditorView({ state: known ?? fresh(), parent: place.current! })
    view.current = editor
    if (!known) void language(path).then((extension) => view.current === editor && editor.dispatch({ effects: lang.reconfigure(extension) }))
    return () => {
      leaveRoom.current?.() // while what it leaves is still kept in `states`
      editor.destroy()
      view.current = null
    }
  }, [path])

  useEffect(() => {
    const editor = view.current
    if (!shared || !editor) return
    let over = false
    void import('./room.ts').then(({ Room }) => {
      if (over) return
      const here = new Room(path, editor, room)
      leaveRoom.current = () => here.leave(true)
    })
    return () => {
      over = true
      leaveRoom.current?.()
      leaveRoom.current = null
    }
  }, [path, shared])

  // What came from outside: only the lines that differ are replaced, so the cursor stays where it is.
  useEffect(() => {
    const editor = view.current
    if (!editor) return
    const now = editor.state.doc.toString()
    if (now === text) return
    let from = 0
    while (from < now.length && from < text.length && now[from] === text[from]) from++
    let end = 0
    while (end < now.length - from && end < text.length - from && now.at(-1 - end) === text.at(-1 - end)) end++
    editor.dispatch({ changes: { from, to: now.length - end, insert: text.slice(from, text.length - end) } })
  }, [text])

  useEffect(() => {
    const editor = view.current
    if (!editor || goTo?.path !== path) return
    const line = editor.state.doc.line(Math.min(Math.max(goTo.line, 1), editor.state.doc.lines))
    const at = Math.min(line.from + Math.max(goTo.column - 1, 0), line.to)
    editor.dispatch({ selection: { anchor: at }, effects: EditorView.scrollIntoView(at, { y: 'center' }) })
    editor.focus()
  }, [goTo, path])

  return <div className="code" ref={place} />
}
