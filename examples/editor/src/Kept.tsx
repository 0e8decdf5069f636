import { MergeView } from '@codemirror/merge'
import { EditorState } from '@codemirror/state'
import { EditorView } from 'codemirror'
import { useEffect, useRef, useState } from 'react'
import { useShallow } from 'zustand/react/shallow'

import { bothOf, decide } from './kept.ts'
import type { Kept as One } from './project.ts'
import { useProjectEditorStore as useStore } from './state.ts'
import { look } from './theme.ts'

const side = (name: string) => [look, EditorState.readOnly.of(true), EditorView.lineWrapping, EditorView.contentAttributes.of({ 'aria-label': name })]

/** What tools in the preview made and was not written, each beside what the project has, to be taken or dropped. */
export default function Kept() {
  const { kept, stale, session } = useStore(useShallow((state) => ({ kept: state.kept, stale: state.stale, session: state.config?.session_id })))
  const [chosen, setChosen] = useState<string | null>(null)
  const shown = kept.find((one) => one.kept_id === chosen)
  return (
    <section className="panel" aria-label="Proposals and conflicts">
      <div className="bar">
        <span>What tools in the preview made, and is not in the project.</span>
        <button onClick={() => useStore.setState({ deciding: false })}>Close</button>
      </div>
      {kept.length === 0 ? (
        <p className="hint">Nothing waits for you. A project has proposals once it has rules for write-back.</p>
      ) : (
        <table className="kept">
          <thead><tr><th scope="col">what</th><th scope="col">file</th><th scope="col">made</th><th scope="col">where</th><th scope="col"><span className="unseen">actions</span></th></tr></thead>
          <tbody>
            {kept.map((one) => (
              <tr key={one.kept_id}>
                <td>{one.kind}</td>
                <td>
                  <button aria-expanded={one === shown} onClick={() => setChosen(one === shown ? null : one.kept_id)}>{one.file_path}</button>
                  <span className="hint"> {changeOf(one)}</span>
                  {stale.has(one.kept_id) && <p className="bad">The file has changed since: compare, and take it over that if you want it.</p>}
                </td>
                <td><time dateTime={one.created_at} title={new Date(one.created_at).toLocaleString()}>{age(one.created_at)}</time></td>
                <td>{one.session_id === session ? 'this session' : <span title={one.session_id}>session {one.session_id.slice(0, 8)}</span>}</td>
                <td><Decision one={one} stale={stale.has(one.kept_id)} /></td>
              </tr>
            ))}
          </tbody>
        </table>
      )}
      {shown && <Difference key={`${shown.kept_id} ${shown.current_version}`} one={shown} />}
    </section>
  )
}

function Decision({ one, stale }: { one: One; stale: boolean }) {
  const proposal = one.kind === 'proposal'
  const take = stale ? 'Take it all the same' : proposal ? 'Accept' : "Take the tool's"
  const drop = proposal ? 'Reject' : 'Keep the current'
  return (
    <>
      <button aria-label={`${take}: ${one.file_path}`} onClick={() => decide(one, true, stale)}>{take}</button>{' '}
      <button aria-label={`${drop}: ${one.file_path}`} onClick={() => decide(one, false, false)}>{drop}</button>
    </>
  )
}

/** What the project has on the left, what the tool made on the right. */
function Difference({ one }: { one: One }) {
  const place = useRef<HTMLDivElement>(null)
  const [failed, setFailed] = useState('')
  useEffect(() => {
    let over = false
    let view: MergeView | undefined
    bothOf(one).then(
      ([current, made]) => {
        if (over) return
        view = new MergeView({
          a: { doc: current, extensions: side('The current file') },
          b: { doc: made, extensions: side('What the tool made') },
          collapseUnchanged: { margin: 3 },
          parent: place.current!,
        })
      },
      (error: Error) => {
        if (!over) setFailed(error.message)
      },
    )
    return () => {
      over = true
      view?.destroy()
    }
  }, [one.kept_id, one.current_version])
  return (
    <>
      <h2>{one.file_path}: the project’s on the left, {one.action === 'delete' ? 'deleted by the tool' : 'the tool’s on the right'}</h2>
      {failed && <p className="hint" role="alert">The two could not be compared: {failed}.</p>}
      <div ref={place} />
    </>
  )
}

function changeOf({ action, base_version, current_version }: One): string {
  if (action === 'delete') return 'is deleted'
  if (base_version === current_version) return base_version === 0 ? 'is new' : `made from version ${base_version}`
  return `made from version ${base_version}, the project has ${current_version}`
}

/** How long ago, coarse enough to stay true for as long as the list is looked at. */
function age(at: string): string {
  const minutes = Math.floor((Date.now() - Date.parse(at)) / 60_000)
  if (minutes < 1) return 'just now'
  if (minutes < 60) return `${minutes} min ago`
  return minutes < 60 * 48 ? `${Math.floor(minutes / 60)} h ago` : `${Math.floor(minutes / 60 / 24)} days ago`
}
